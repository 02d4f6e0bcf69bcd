"""Fill one part of a histogram, with a seed of its own."""

import sys

import ROOT

mass = ROOT.TH1D("mass", "All parts;m [GeV];events", 60, 60.0, 120.0)
chance = ROOT.TRandom3(int(sys.argv[1]) + 1)
for _ in range(1000):
    mass.Fill(chance.Gaus(91.2, 2.5))
file = ROOT.TFile("part.root", "RECREATE")
mass.Write()
file.Close()
