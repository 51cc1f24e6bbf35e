"""The recorded study: does a memory that learns while it listens help, against LoRA of as many parameters?

``plan`` says what is compared, ``material`` what is heard, ``stages`` runs it by the commands that users have,
``results`` and ``report`` say what came out.
"""
