#!/bin/sh
exec wget -q http://dav/data.bin
