"""Other libraries' models behind the tasks of `benchmarks.quality`. They run in an environment of their own."""
