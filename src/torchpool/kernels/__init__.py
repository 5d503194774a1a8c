"""The same operations three times: `reference` (plain torch), `cpu` (Numba), `gpu` (Triton)."""
