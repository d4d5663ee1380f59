"""The networks that `rahf.train` trains: RAHF and the baselines, by the config's `model.architecture`.

Each has a module with RAHF's methods `__call__`, `perceive` and `predict`, whose results are None for what it does not
predict, and a configuration with `image_size`, `heatmap_size`, `variant` (of `schema.VARIANTS`), `parts` (of `schema.PARTS`,
what it predicts), `deviations` (whether also those of its scores, as a fourth result of `predict`), `dtype` and
`vocab_size` (the ids that it embeds; None if it reads no text).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from flax import linen as nn

from rahf.models.baselines import CLIPCritic, CLIPCriticConfig, ResNetCritic, ResNetCriticConfig
from rahf.models.rahf import RAHF, RAHFConfig
from richhf_data import checked, schema

CONFIGS = {"rahf": RAHFConfig, "resnet": ResNetCriticConfig, "clip": CLIPCriticConfig}
MODULES = {RAHFConfig: RAHF, ResNetCriticConfig: ResNetCritic, CLIPCriticConfig: CLIPCritic}
CriticConfig = RAHFConfig | ResNetCriticConfig | CLIPCriticConfig


def config_of(values: Mapping) -> CriticConfig:
    """The configuration in a config's section `model`, as nested plain dictionaries. Absent options have their defaults.

    Raises:
      UserError: an unknown architecture or option (the message has the nearest known one), or a value of the wrong type.
    """
    architecture = checked.conform(Literal[tuple(CONFIGS)], values.get("architecture", "rahf"), "model.architecture")
    return checked.conform(CONFIGS[architecture], values, "model")


def module_of(config: CriticConfig) -> nn.Module:
    """The network of a configuration."""
    return MODULES[type(config)](config)


def dummy_inputs(config: CriticConfig, length: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zeros (image, text_ids, keyword_ids) to initialise with, B = 1. L = T = `length` changes no parameter's shape."""
    image = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    return image, np.zeros((1, schema.num_texts(config.variant), length), np.int32), np.zeros((1, length), np.int32)
