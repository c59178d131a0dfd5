"""Parts of the trainer `samples/distill.py`: models and prompts, cached samples, losses, what is trained."""
