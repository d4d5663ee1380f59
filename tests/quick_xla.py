"""XLA flags for tests, in which compiling takes longer than computing."""

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
