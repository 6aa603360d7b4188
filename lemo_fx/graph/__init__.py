"""Reading a model: its anatomy, the graphs of its modules, the branches in them. Changes nothing."""
