"""What tests share: ranks by a preloaded forkserver, tiny configurations, comparisons."""
