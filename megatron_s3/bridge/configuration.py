"""Configurations for Megatron-Bridge that build an optimizer of the plugin."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig
from megatron.core import optimizer as core

from megatron_s3.mcore import build
from megatron_s3.mcore.configuration import hyperparameter_fields, plugin_fields, post_init
from megatron_s3.optimizers import S3, ElementwiseOptimizer

__all__ = ["ElementwiseOptimizerConfig", "S3OptimizerConfig", "configures"]

Class = TypeVar("Class", bound=type[Any])


class ElementwiseOptimizerConfig(OptimizerConfig):  # type: ignore[misc]  # Bridge has no types
    """Base class of the configurations that build an optimizer of the plugin.

    Attributes:
        builds: the class of the optimizer.
        schedule: the recipe's configuration of the schedule, which says whether a resumed run uses
            the learning rates of the checkpoint; no field. Without it the run uses its own, unless
            the plugin is registered.
    """

    builds: ClassVar[type[ElementwiseOptimizer]]
    schedule: SchedulerConfig | None = None

    def finalize(self) -> None:
        """Checks the fields and sets derived ones, as Bridge's own configuration does.

        Raises:
            ValueError: a hyperparameter has a value that is not allowed, or ``optimizer`` names
                another optimizer.
        """
        self._check_name()
        post_init(OptimizerConfig.finalize, self)

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> Any:
        """Builds the optimizer.  Bridge calls this method instead of Megatron's builder.

        The plugin need not be registered; if it is, the result is the same.

        Args:
            model_chunks: the model in Megatron's wrapper, or a list of its chunks.
            config_overrides: settings for single parameters, by ParamKey.
            use_gloo_process_groups: whether Megatron may use gloo process groups.
            pg_collection: the process groups; the global ones if None.

        Returns:
            Megatron's optimizer, which contains optimizers of the plugin.

        Raises:
            ValueError: the optimizer does not support a setting of the configuration; the message
                names a field as Megatron's flag of the same name.
        """
        self._check_name()
        return build.get_megatron_optimizer(
            core.get_megatron_optimizer,
            self,
            list(model_chunks) if isinstance(model_chunks, list | tuple) else [model_chunks],
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
        )

    def _check_name(self) -> None:
        name = self.builds.description.name
        if self.optimizer != name:
            raise ValueError(
                f"{type(self).__name__} has optimizer={str(self.optimizer)!r}, but it builds "
                f"{name!r} alone. Leave optimizer out, or use Megatron-Bridge's OptimizerConfig."
            )


def configures(cls: type[ElementwiseOptimizer]) -> Callable[[Class], Class]:
    """Returns a decorator that makes a class the configuration of an optimizer.

    The class becomes a dataclass with a keyword-only field for each hyperparameter and switch
    (``s3_beta``).  ``optimizer`` and ``clip_grad`` have the optimizer's name and default.
    """

    def decorate(config: Class) -> Class:
        description = cls.description
        defaults: dict[str, Any] = {
            "optimizer": (str, description.name),
            "clip_grad": (float, description.clip_grad),
        }
        for name, kind, default in (*hyperparameter_fields(cls), *plugin_fields()):
            defaults[name] = (kind, dataclasses.field(default=default, kw_only=True))
        config.__annotations__ = {name: kind for name, (kind, _) in defaults.items()}
        for name, (_, default) in defaults.items():
            setattr(config, name, default)
        config.builds = cls
        dataclasses.dataclass(config)
        return config

    return decorate


@configures(S3)
class S3OptimizerConfig(ElementwiseOptimizerConfig):
    """Megatron-Bridge's ``OptimizerConfig`` for S3.

    It has all fields of Bridge's class, and one for each hyperparameter of S3 (``s3_beta``,
    ``s3_p`` and so on).  You can set them by keyword, in YAML, and on Bridge's command line
    (``optimizer.s3_p=2.0``).  ``run_config.yaml`` records them.  ``clip_grad`` is 0 by default.
    """
