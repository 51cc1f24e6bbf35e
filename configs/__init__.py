"""The configs that ship with the package (YAML files), and the modules that read a config.

``paths`` finds a config by name or path, ``reading`` reads what it says about the model. ``training`` has the options
of a training run, ``settings`` reads a whole run, ``sections`` has what quickstart reads, ``speakers`` says which side
of a recording is Moshi's. Nothing here imports the code that trains.
"""
