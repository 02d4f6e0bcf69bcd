"""deskgrid: a desktop grid whose jobs run in virtual machines on volunteers' PCs."""

__version__ = "0.1.0"
