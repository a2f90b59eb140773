"FLIP (CLIP training with randomly masked image patches): `from flip_nb import FLIP`. Everything is imported at its first use."
__version__ = "0.1.0"

from importlib import import_module

_homes = dict(FLIP='model', FLIPConfig='model', random_mask='masking', info_nce='loss')    # name -> its module
__all__ = [*_homes]

def __getattr__(name):
    if name in _homes: return getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it offers {", ".join(__all__)}')

def __dir__(): return sorted({*globals(), *__all__})
