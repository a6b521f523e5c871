"""One file per sampler: NAME.py holds the class whose `name` is NAME. Shared code starts with an underscore."""

from importlib import import_module

from minidiff.sampling.samplers._sampler import Sampler


def sampler_class(name: str) -> type[Sampler]:
    """The class of a sampler in vocabulary.SAMPLERS."""
    for value in vars(import_module(f"{__name__}.{name}")).values():
        if isinstance(value, type) and issubclass(value, Sampler) and vars(value).get("name") == name:
            return value
    raise ImportError(f'{name}.py holds no Sampler with name = "{name}"')
