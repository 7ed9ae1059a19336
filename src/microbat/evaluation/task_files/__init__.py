"""Task files of lm-evaluation-harness for local jsonl copies; ``microbat.evaluation.tasks`` fills in their paths."""
