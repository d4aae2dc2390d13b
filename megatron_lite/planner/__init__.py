"""Know before you pay: what a Blueprint needs in memory and time on given machines, and which is best.

Pure functions over config and blueprint, never torch; it imports those two only, and only tools may
import it.  Begin with forecast.py (Blueprint + Cluster -> Forecast), then memory.py and cost.py.
"""
