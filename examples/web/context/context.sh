#!/bin/sh
# Serve a page until the job is cancelled. What is left in /scratch would be the result.
mkdir -p /scratch/www
echo "hello from job $DESKGRID_JOB" >/scratch/www/index.html
exec httpd -f -p 8080 -h /scratch/www
