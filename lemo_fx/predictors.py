"""placeholder"""


class Predictors: ...
