"""The memories by name: the only place that names them all."""

from .associative import ARMTMemory
from .base import Memory
from .continuous import InfinityMemory
from .eidetic import BMojoMemory
from .hadamard import SHMMemory
from .lookahead import LaMemoMemory
from .memory_transformer import MemoryTransformerMemory
from .none import NoMemory
from .rmt import RMTMemory
from .slots import MemformerMemory
from .xl import XLMemory

MEMORIES: dict[str, type[Memory]] = {
    "none": NoMemory,
    "rmt": RMTMemory,
    "xl": XLMemory,
    "memformer": MemformerMemory,
    "armt": ARMTMemory,
    "lamemo": LaMemoMemory,
    "bmojo": BMojoMemory,
    "infinity": InfinityMemory,
    "shm": SHMMemory,
    "memory_transformer": MemoryTransformerMemory,
}
