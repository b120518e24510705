"""How the tests' processes compile: read from the environment when a backend is imported."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On JAX and TensorFlow the suite compiles, everything else waits: what runs once is not optimized,
# a third to half of the time. Workers and the processes that tests start share what one of them
# compiled, and the next run finds it again. TensorFlow does not ask which version wrote it.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    versions = [
        f"{found.name}-{found.version}"
        for found in importlib.metadata.distributions()
        if found.name in ("tensorflow", "tensorflow-cpu", "tensorflow_cpu")
    ]
    os.environ.setdefault(
        "TF_XLA_FLAGS",
        f"--tf_xla_persistent_cache_directory={ROOT / '.tf_cache' / '-'.join(sorted(versions))}",
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # in every operation of a program
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false",
)
