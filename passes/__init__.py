"""Graph in, graph out: everything between capture and the program that the runtime executes."""
