"""What a model can do, and what quantization cost it: perplexity, distance from the float model, benchmarks."""
