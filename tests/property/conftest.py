from hypothesis import settings

# How long an example takes depends on who else uses the machine.
settings.register_profile("metaswarm", deadline=None, print_blob=True)
settings.load_profile("metaswarm")
