"""The recorded study: do TTT layers help, against LoRA with as many parameters?

``plan`` says what is compared, ``material`` makes the training material, ``stages`` runs the commands that users have,
``results`` and ``report`` read and show what came out.
"""
