"""The parts of `train_lm.py`: text, model, training loop and report."""
