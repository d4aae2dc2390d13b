"""Who takes part, and who is still there: what torchrun says, the store, heartbeats, device and process group.

Imports config only; the loop and the tools may import it.
Begin with launch.py (joining and leaving), then heartbeat.py and detector.py (who is lost, who hangs).
"""
