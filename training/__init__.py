"""Training: one loop for any host, and the run of ``moshi-ttt train`` built on it.

For any host: ``trainer`` is the loop (``Trainer.fit``), ``callback`` the contract of what happens around its steps,
``callbacks``, ``validation``, ``saving`` and ``inner_losses`` hold the callbacks, ``trained`` says what is trained,
``optimizer`` the rates, ``runtime`` the ranks, ``stopping`` where a step can be left, ``checkpoint`` saves and resumes,
``checkpoint_contents`` names the tensors of a checkpoint, ``logs`` records what happens.

For Moshi: ``run`` assembles all of it from a config, ``model`` builds and fills the model, ``export`` writes what
others use, ``planning`` computes what a run needs, ``plan_tables`` prints it. The options are in
``moshi_ttt.configs.training``.
"""

from moshi_ttt.configs.fit import FitConfig
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.runtime import Runtime, start
from moshi_ttt.training.step import Outcome, Step, TrainingError
from moshi_ttt.training.trained import TrainedModel
from moshi_ttt.training.trainer import Trainer

__all__ = ["Callback", "FitConfig", "Outcome", "Runtime", "Step", "TrainedModel", "Trainer", "TrainingError", "start"]
