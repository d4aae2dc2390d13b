"""Joining and leaving: torchrun's environment, the store, heartbeats, device and process group.

Imports config only; the loop and the tools may import it.
Begin with launch.py (joining and leaving), then heartbeat.py and detector.py (who is lost, who hangs).
"""
