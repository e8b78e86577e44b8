"""Pictures of runs and topologies; matplotlib and Pillow are imported where they are used."""
