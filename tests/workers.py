"""Plugin of the processes that run tests: seeds, a clean configuration for each, the digits."""

import gc

import accelerated
import data  # noqa: F401  its settings
import hypothesis
import keras
import pytest

from keras_lipnext.backend import programs

# Property tests compile on their first example: no deadline. The same examples every time, and
# fewer where each shape is compiled anew.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=25 if keras.backend.backend() == "torch" else 10,
)
hypothesis.settings.load_profile("suite")


# Traces and graphs are many objects that live on: looking through all of them again and again takes
# a tenth of the time.
gc.set_threshold(20_000, 20, 50)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A card certifies no float32 program, and says so: their tests are left to CPUs."""
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        refused = "No float32 program can be certified in this process" in str(error)
        if accelerated.ON_CPU or not refused:
            raise
        pytest.skip("float32 programs are certified on CPUs")


@pytest.fixture(autouse=True)
def clean_keras(request):
    """Each test starts from the same seed and leaves no global setting behind."""
    keras.utils.set_random_seed(1)
    if "monkeypatch" in request.fixturenames:  # no program traced before hides what it patches
        request.addfinalizer(programs._program.cache_clear)
        programs._program.cache_clear()
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_image_data_format("channels_last")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """JAX keeps every program it compiled: memory in so many pieces slows a process."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def digits():
    """((x_train, y_train), (x_test, y_test)) of scikit-learn's digits in [0, 1]."""
    from data import load_digits_split

    return load_digits_split()


@pytest.fixture(scope="session")
def trained(digits):
    """A small LipNeXt after four epochs on the digits; tests leave it as it is."""
    from data import small_lipnext

    keras.utils.set_random_seed(1)
    (x, y), _ = digits
    model = small_lipnext(width=32, epsilon=0.1)
    model.fit(x[:1344], y[:1344], epochs=4, batch_size=64, verbose=0)  # whole batches: one program
    return model
