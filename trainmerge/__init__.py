"""trainmerge: learned-coefficient model merging.

The public names are listed in `__init__.pyi`. Each is imported when first used, so that `import trainmerge`
and `trainmerge --help` are quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
