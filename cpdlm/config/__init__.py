"""Every setting of a run. Precedence, weakest first: defaults < presets < command line.

Nothing here imports torch, so that `--help` and every configuration error come before any slow import.
"""

from cpdlm.config.checks import WEIGHTS, check, is_name, out_of_range
from cpdlm.config.presets import PRESETS
from cpdlm.config.reading import (
    as_yaml,
    check_words,
    expand,
    from_dict,
    help_text,
    parse,
    resolve,
    to_dict,
    upgrade,
    without_credentials,
)
from cpdlm.config.settings import (
    CHOICES,
    FAMILIES,
    INCIDENTAL,
    Config,
    ConfigError,
    DecodeConfig,
    EvaluateConfig,
    LossConfig,
    OptimConfig,
    but_rank,
    flat,
    flatten,
    leaves,
)
from cpdlm.config.sizes import SIZES
