from hypothesis import settings

settings.register_profile("apt", deadline=None)  # the first call of a PyTorch function is slow
settings.load_profile("apt")
