"""LoRA adapters, full fine-tuning, and the model's files in a checkpoint. Only this package imports PEFT."""
