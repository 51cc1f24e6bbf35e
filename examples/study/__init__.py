"""The recorded study: which memory recalls, and what does it cost on speech that is played once?

``plan`` says what is compared, ``material`` makes the training material, ``stages`` runs the commands that users have,
``measures`` and ``measure`` are what is measured of a model, ``choice`` is the rule, ``results``, ``curves``,
``report`` and ``pictures`` read and show what came out.
"""
