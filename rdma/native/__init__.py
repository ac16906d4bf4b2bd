"""The C core of the fabrics and its builder; fabric.h and job.h say how the parts fit."""
