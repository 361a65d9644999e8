"""Whole learner cycles, from collecting to promoting: on real networks, in processes of their own, and make demo."""
