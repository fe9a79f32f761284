"""Time, memory and quality of fine-tuning."""
