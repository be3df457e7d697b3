"""Stand-ins and drivers for the processes of the engine, by room."""
