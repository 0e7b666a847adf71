"""LoRA adapters as PEFT stores them: their configuration, their tensors, and what each of these means."""
