class MixtureOfExperts:
    pass
