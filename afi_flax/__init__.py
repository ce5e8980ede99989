"""Training image classifiers with Attentive Feature Integration (AFI) in JAX and Flax.

The library's front door: `afi_flax.load_run(workdir)` opens a trained network, and
`afi_flax.models.create_model(name)` makes a new one.
"""


def __getattr__(name: str):
  # Late, because the workers that decode pictures import this package and must not import jax.
  if name == 'load_run':
    from afi_flax.run import load_run

    return load_run
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
