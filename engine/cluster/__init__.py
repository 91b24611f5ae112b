"""Starting the processes of a cluster and keeping them; never imports jax."""
