"""Networks whose features start identical, and what makes them different."""
__version__ = "0.1.0"

# Names that may be imported from here, and the module that has each. They are looked up when they are asked for, so
# that importing symbreak costs nothing. `quotient` and `train` are missing: modules have these names.
_PLACES = {"ConstNet": "nets", "LeakyNet": "nets", "weight_correlation": "diversity", "distinct_features": "diversity",
           "asymmetry": "diversity", "effective_width": "diversity", "expand": "quotient", "growth_rate": "growth",
           "break_time": "growth", "Config": "config", "Run": "outcome", "predict": "prediction",
           "reproduce": "results", "probe": "hardware", "check": "symmetry", "Check": "symmetry"}


def __getattr__(name: str):
    if name not in _PLACES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]: return sorted([*globals(), *_PLACES])
