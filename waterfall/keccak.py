"""keccak256, by the backend in C: eth-hash would take the first it finds, which may be six times as slow."""

from eth_hash.backends import pysha3
from eth_hash.main import Keccak256

keccak = Keccak256(pysha3.backend)
