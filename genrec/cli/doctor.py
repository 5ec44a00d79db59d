"""Say what this machine has: versions, which kernels are native, whether there is a GPU."""
from dataclasses import dataclass
@dataclass
class Config:
    check: bool = False
    """Also run every operator against its float64 reference."""
def run(config: Config) -> None:
    print("todo", config)
