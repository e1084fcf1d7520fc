from .architecture import contents, describe
