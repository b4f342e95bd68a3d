-- Whether a request, or a plain job, runs. This is the only source of that: its hash names an execution, and the index of
-- the holder has the same one. A hash alone may be what a claim left that stopped halfway; an entry of the index alone is
-- of an id that was deleted, and perhaps used again. `leases` holds times only.
local function runs(id, execution, holder)
  return (execution or '') ~= '' and redis.call('HGET', KEY.held .. (holder or ''), id) == execution
end
