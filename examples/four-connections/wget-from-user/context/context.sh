#!/bin/sh
exec wget -q http://site:8000/data.bin
