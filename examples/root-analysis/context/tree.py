"""Make a tree of so many events."""

import sys
from array import array

import ROOT

file = ROOT.TFile("events.root", "RECREATE")
tree = ROOT.TTree("events", "Events")
momentum, charge = array("d", [0.0]), array("i", [0])
tree.Branch("pt", momentum, "pt/D")
tree.Branch("charge", charge, "charge/I")
chance = ROOT.TRandom3(2)
for _ in range(int(sys.argv[1])):
    momentum[0] = chance.Exp(15.0)
    charge[0] = 1 if chance.Rndm() < 0.5 else -1
    tree.Fill()
tree.Write()
file.Close()
