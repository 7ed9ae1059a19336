"""Task files of lm-evaluation-harness for local jsonl copies; ``microbat.evaluate.tasks`` fills in their paths."""
