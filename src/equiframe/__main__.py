from equiframe.cli import command

command()
