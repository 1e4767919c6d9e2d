from workers.environment import EnvironmentWorker as _E
class EnvironmentWorker(_E):
    def __init__(self, rank, world_size, *args):
        _E.__init__(self, *args)
