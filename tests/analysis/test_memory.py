from types import SimpleNamespace

import jax
import pytest

from afi_flax import config, sharding
from afi_flax.analysis import memory
from afi_flax.errors import UserError
from configs import cifar100_afi_resnet32


def peak(function, **options):
  x = jax.ShapeDtypeStruct((512, 512), 'float32')  # 1 MiB
  return memory.peak_bytes(jax.jit(function, **options).lower(x).compile()) / memory.MIB


def test_peak_counts_arguments_results_and_what_is_between():
  assert 2 <= peak(lambda x: x + 1) < 2.01  # the argument and the result
  assert 1 <= peak(lambda x: x + 1, donate_argnums=0) < 1.01  # in place of the argument
  assert 3 <= peak(lambda x: jax.lax.cummax(x @ x)) < 4.01  # the product too


def test_what_does_not_fit(monkeypatch):
  x = jax.ShapeDtypeStruct((512, 512), 'float32')
  compiled = jax.jit(lambda x: x + 1).lower(x).compile()
  monkeypatch.setattr(memory.hardware, 'memory_bytes', lambda devices: 3 * memory.MIB)
  assert memory.check_fits(compiled, jax.devices(), 'use less') == '2 of 3 MiB'
  monkeypatch.setattr(memory.hardware, 'memory_bytes', lambda devices: None)
  assert memory.check_fits(compiled, jax.devices(), 'use less') == '2 MiB'
  monkeypatch.setattr(memory.hardware, 'memory_bytes', lambda devices: memory.MIB)
  with pytest.raises(UserError, match=r'needs 2 MiB of memory .* which has 1; use less'):
    memory.check_fits(compiled, jax.devices(), 'use less')


def test_what_a_compiler_finds_by_itself():
  def lowered(message):
    def compile():
      raise jax.errors.JaxRuntimeError(message)

    return SimpleNamespace(compile=compile)

  of_a_tpu = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
    'Used 33.37G of 15.75G hbm. Exceeded hbm capacity by 17.62G.'
  )
  with pytest.raises(UserError, match=r'the step needs 33\.37G of the 15\.75G of a device; use le'):
    memory.compile_or_explain(lowered(of_a_tpu), 'use less')
  with pytest.raises(UserError, match='needs more memory than the device'):
    memory.compile_or_explain(lowered('RESOURCE_EXHAUSTED: Out of memory'), 'use less')
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    memory.compile_or_explain(lowered('INTERNAL: of XLA'), 'use less')


def test_cure_is_what_the_run_does_not_do_already():
  recipe = cifar100_afi_resnet32.get_config()
  recipe.batch_size = 30
  everything = 'micro_batches=3 or more, --config.model.remat=block, --config.model.dtype=bfloat16'
  assert everything in memory.train_cure(config.resolve(recipe, 2), 2)
  recipe.micro_batches, recipe.model.remat, recipe.model.dtype = 15, 'block', 'bfloat16'
  assert memory.train_cure(config.resolve(recipe, 2), 2) == 'use a smaller --config.batch_size'


def test_collectives_of_a_program():
  mesh = sharding.make_mesh()
  x = jax.ShapeDtypeStruct((8, 64, 3), 'float32', sharding=sharding.split(mesh))
  add = jax.jit(lambda x: x.sum(axis=0), out_shardings=sharding.replicated(mesh))
  assert memory.collectives(add.lower(x).compile()) == {'all-reduce': (1, 64 * 3 * 4)}
  gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
  assert memory.collectives(gather.lower(x).compile()) == {'all-gather': (1, 8 * 64 * 3 * 4)}
  assert memory.collectives(jax.jit(lambda x: x + 1).lower(x).compile()) == {}


def test_collectives_that_go_on_in_the_background():
  text = """
  %a = (f32[64]{0:T(128)}, /*index=1*/bf16[2,3]{1,0}) all-reduce-start(%x, %y), channel_id=1
  %b = (f32[64]{0:T(128)}, bf16[2,3]{1,0}) all-reduce-done(%a)
  ROOT %c = pred[]{:T(512)} all-reduce(%z), metadata={op_name="jit(f) = all-reduce"}
  %d = f32[7]{0} fusion(%all-reduce.5), calls=%e
  """
  compiled = SimpleNamespace(as_text=lambda: text)
  assert memory.collectives(compiled) == {'all-reduce': (2, 64 * 4 + 6 * 2 + 1)}
